"""Loops in C for CPUs, compiled where they run. Everything that uses them has a way in tensor operations as well."""
