"""Serving a private adapter, and using one: server, client session, hooks on the model, masks ahead of time."""

import os

# gRPC's C core writes lines of its own to stderr, one for every handshake that fails: into the JSON of a log, and under
# the one line that an error of ours is. It reads this when it is first imported; whoever wants its lines sets it.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
