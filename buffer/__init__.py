"""The durable data buffer: prompts, their order, the ledger of their fates, and the samples they became."""
