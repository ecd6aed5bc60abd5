"""A registered model over HTTP: an ingress and replicas under Ray Serve."""
