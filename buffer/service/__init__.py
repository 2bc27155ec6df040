"""The buffer over HTTP: its service and its client."""
