//! The one way in which commands make HTTP clients.

use std::sync::Once;

use anyhow::{Context, Result};

/// A client builder whose TLS works whatever else is linked in.
pub fn client_builder() -> reqwest::ClientBuilder {
    static PROVIDER: Once = Once::new();
    // An error means that another provider is installed already, which serves as well.
    PROVIDER.call_once(|| drop(rustls::crypto::ring::default_provider().install_default()));
    reqwest::Client::builder().user_agent(concat!("stoker/", env!("CARGO_PKG_VERSION")))
}

/// A client with the usual settings.
pub fn client() -> Result<reqwest::Client> {
    build(client_builder())
}

/// Builds a client.
pub fn build(builder: reqwest::ClientBuilder) -> Result<reqwest::Client> {
    builder.build().context("cannot make an HTTP client")
}
