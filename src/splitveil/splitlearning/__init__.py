"""Split learning: a model trained and used with its lower blocks on a device and its upper blocks in the cloud."""
