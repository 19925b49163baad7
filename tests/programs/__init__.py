"""Programs that tests start: `python -m tests.programs.NAME`, and the stand-ins for cluster tools in cluster/."""
