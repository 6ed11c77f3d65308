"""The foundation of all other modules: errors, files, the device and distributed processes."""
