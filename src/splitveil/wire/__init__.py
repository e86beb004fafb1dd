"""The wire format: message definitions, and a codec that enforces every limit."""
