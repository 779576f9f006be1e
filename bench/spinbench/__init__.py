"""Benchmark harness: a process per provider, bursts in rotating order, floors from measured ceilings."""
