"""What everything stands on: errors, files, the device, several processes."""
