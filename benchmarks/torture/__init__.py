"""What a run survives, counted: kills, failing disks, power cuts, damage, signals. `make torture`."""
