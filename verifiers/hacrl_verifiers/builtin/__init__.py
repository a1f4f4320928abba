"""The verifiers that come with the exchange, registered by entry point exactly like a stranger's."""
