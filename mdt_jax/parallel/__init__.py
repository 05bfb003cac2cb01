"""How a job is spread: device mesh, processes, stopping, compiled programs."""
