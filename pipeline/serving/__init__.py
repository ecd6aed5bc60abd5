"""Drawing images on request: the step-level engine and the HTTP contract."""
