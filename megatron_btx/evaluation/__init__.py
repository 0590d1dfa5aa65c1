"""Loss per domain, who is routed where, and routers fitted to the experts."""
