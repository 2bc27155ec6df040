"""Reading the ledger of a run: audit, numbers, lives, export. Nothing here writes to it."""
