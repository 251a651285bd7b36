"""`fedgraft scenarios`: the scenarios that come with fedgraft, and what a configuration deals to its sites."""
