"""The service that removes from the cluster what is recorded, and reaps what nobody owns."""
