"""The scenarios that come with fedgraft, one TOML file each."""
