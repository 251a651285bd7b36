"""Words shared by every room: adapters, the wire, configuration, base models, tasks."""
