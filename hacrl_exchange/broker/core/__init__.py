"""The pure machines of a pool: no I/O, no clock, no randomness, no protobuf."""
