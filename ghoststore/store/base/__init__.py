"""Files, records and manifests, whatever they are of."""
