"""The gRPC services: requests in, commands to the core, durable replies out."""
