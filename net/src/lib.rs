//! Bulk transport: RPC whose payloads land in the caller's buffers, and ordered channels for collectives.
