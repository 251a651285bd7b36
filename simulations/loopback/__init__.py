"""A whole deployment on this machine: authority, server and sites as in production, on the loopback interface."""
