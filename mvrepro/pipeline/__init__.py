"""What is computed, from what (plan); whether what lies here belongs to it (freshness); and computing it (workers)."""
