"""End-to-end jitted training: whole runs as one compiled program, which sweeps vmap."""
