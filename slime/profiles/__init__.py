"""The shipped profiles: where a run happens."""
