"""The main job, end to end, on the embedded default: what ``splitveil demo`` shows."""
