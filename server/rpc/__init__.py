"""Parts of every gRPC call: dispatch, authentication, status, audit. Start at dispatch."""
