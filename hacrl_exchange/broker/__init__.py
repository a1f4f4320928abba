"""The broker: a pure core, a log under it, gRPC services around it. Clients never import it."""
