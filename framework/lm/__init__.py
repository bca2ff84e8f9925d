"""Language models: the catalogue, the in-process engine, the direct adapter, the ledger and the budget."""
