"""Helpers of engine=torch: what its modules compute in."""
