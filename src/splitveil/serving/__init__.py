"""Serving a private adapter, and using one: server, client session, hooks on the model, masks ahead of time."""
