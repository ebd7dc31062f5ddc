//! gRPC: proto ↔ domain, status mapping, one file per service.
