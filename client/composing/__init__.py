"""What a site tells a merging rule beside adapters: scores on a few records, embeddings of texts, statistics."""
