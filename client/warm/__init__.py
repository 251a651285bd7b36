"""The worker of a site: it takes a SuperNode's tasks and answers them with the site's own code, which stays in memory.

Two processes. The *worker* speaks with the SuperNode, holds no model, and outlives whatever happens to the other; the
*answerer* holds imports, base model and data, and answers one instruction after another.
"""
