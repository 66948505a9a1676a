"""Commands: configuration to records, and what runs them."""
