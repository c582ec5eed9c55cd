"""Timing engines: the contract, several at once, the stage that runs it, and the tables that come out."""
