"""The service under kill -9, lost replies and dead consumers, and the checker of what everybody saw."""
