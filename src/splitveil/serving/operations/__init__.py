"""What whoever runs a server needs: who is there, logs, metrics, health, signals."""
