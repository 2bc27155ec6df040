"""Where prompts come from: files, their index, their order."""
