"""The Kubernetes operator: adds and removes pods and has their coordinator resize the group.

`core` decides and `builders` write objects (both pure); around them the Kubernetes API, the
coordinator's HTTP API and kopf.
"""
