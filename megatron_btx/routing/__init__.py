"""Who is routed where: telemetry of a run, analysis of a checkpoint, warm-started routers."""
