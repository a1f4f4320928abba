"""The exchange: types, client SDK, broker and command line."""
