//! A Hugging Face directory: `config.json`, `tokenizer.json` and friends, and safetensors in one file or many.

use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};

use memmap2::Mmap;
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::checkpoint::{Entry, Place, Tensors, fault, map};
use super::names::gguf_name;
use super::{DType, Fault, ModelConfig, TensorView, hf_config};
use crate::tokenizer::{self, Special, Tokenizer};
use crate::{ChatTemplate, LoadError};

/// Files beside the weights that say what the text is.
const TEXT_FILES: [&str; 6] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
];
/// The list of shards' contents.
const INDEX: &str = "model.safetensors.index.json";

/// A directory whose small files are read.
#[derive(Debug)]
pub struct Directory {
    path: PathBuf,
    /// Those of [`TEXT_FILES`] that are there.
    files: HashMap<&'static str, Vec<u8>>,
    config: ModelConfig,
    tied: Option<bool>,
}

impl Directory {
    /// Reads the small files.
    pub fn open(path: &Path) -> Result<Self, LoadError> {
        let mut files = HashMap::new();
        for name in TEXT_FILES {
            if let Some(bytes) = read_if_there(&path.join(name))? {
                files.insert(name, bytes);
            }
        }
        let wrong = |f| fault(path, f);
        let json = json_of(&files, "config.json").map_err(wrong)?;
        let json = json.ok_or_else(|| wrong(Fault::Malformed("config.json is missing".into())))?;
        let config = hf_config::read(&json).map_err(wrong)?;
        let text = json.get("text_config").filter(|t| t.is_object()).unwrap_or(&json);
        let tied = text["tie_word_embeddings"].as_bool().or(json["tie_word_embeddings"].as_bool());
        Ok(Self { path: path.to_owned(), files, config, tied })
    }

    /// All tensors of the text model under GGUF's names, and the files that they lie in.
    pub fn tensors(&mut self) -> Result<(Tensors, Vec<Mmap>), LoadError> {
        let mut tensors = Tensors::new();
        let mut maps = Vec::new();
        for name in self.shards()? {
            let path = self.path.join(name);
            let map = map(&path)?;
            self.read_shard(&map, maps.len(), &mut tensors).map_err(|f| fault(&path, f))?;
            maps.push(map);
        }
        self.complete(&tensors);
        if self.config.tied_embeddings {
            tensors.remove("output.weight");
        }
        Ok((tensors, maps))
    }

    /// The files that hold weights.
    fn shards(&self) -> Result<Vec<String>, LoadError> {
        let index = self.path.join(INDEX);
        if let Some(bytes) = read_if_there(&index)? {
            return shards_of(&bytes).map_err(|f| fault(&index, f));
        }
        let one = "model.safetensors";
        match self.path.join(one).is_file() {
            true => Ok(vec![one.into()]),
            false => Err(fault(&self.path, Fault::Malformed(format!("neither {one} nor {INDEX} is there")))),
        }
    }

    fn read_shard(&self, data: &[u8], file: usize, tensors: &mut Tensors) -> Result<(), Fault> {
        let (header, metadata) =
            SafeTensors::read_metadata(data).map_err(|e| Fault::Malformed(e.to_string()))?;
        for (name, info) in metadata.tensors() {
            if ["vision_tower.", "multi_modal_projector."].iter().any(|other| name.contains(other)) {
                continue;
            }
            let dtype = match info.dtype {
                Dtype::F32 => DType::F32,
                Dtype::F16 => DType::F16,
                Dtype::BF16 => DType::BF16,
                other => return Err(Fault::Unsupported(format!("tensor {name} has format {other:?}"))),
            };
            if info.shape.is_empty() || info.shape.contains(&0) {
                return Err(Fault::Malformed(format!("tensor {name} is empty")));
            }
            // Offsets count from the end of the header, which its 8-byte length precedes. The library has checked them.
            let start = 8 + header;
            let range = start + info.data_offsets.0..start + info.data_offsets.1;
            let entry = self.entry(dtype, info.shape.clone(), &name, data, file, range);
            if tensors.insert(gguf_name(&name, self.config.post_norms), entry).is_some() {
                return Err(Fault::Malformed(format!("tensor {name} is there twice")));
            }
        }
        Ok(())
    }

    /// A tensor as the engine wants it. Gemma's checkpoints store its norms' weights less 1, GGUF files as they are used.
    fn entry(
        &self,
        dtype: DType,
        shape: Vec<usize>,
        name: &str,
        data: &[u8],
        file: usize,
        range: std::ops::Range<usize>,
    ) -> Entry {
        if self.config.architecture != "gemma3" || !name.ends_with("norm.weight") {
            return Entry { dtype, shape, place: Place::Mapped { file, range } };
        }
        let values = TensorView { dtype, shape: shape.clone(), data: &data[range] }.dequantize();
        let bytes = values.iter().flat_map(|x| (x + 1.0).to_le_bytes()).collect();
        Entry { dtype: DType::F32, shape, place: Place::Owned(bytes) }
    }

    /// Adds to the sizes what the tensors tell.
    fn complete(&mut self, tensors: &Tensors) {
        let c = &mut self.config;
        c.vocab = tensors.get("token_embd.weight").map_or(0, |t| t.shape[0]);
        c.tied_embeddings = self.tied.unwrap_or(!tensors.contains_key("output.weight"));
        c.qkv_bias = tensors.contains_key("blk.0.attn_q.bias");
        c.qk_norm |= tensors.contains_key("blk.0.attn_q_norm.weight");
    }

    /// Sizes and architecture; complete once the tensors have been read.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The tokenizer, for an embedding of so many rows.
    pub fn tokenizer(&self, rows: usize) -> Result<Tokenizer, LoadError> {
        let path = self.path.join("tokenizer.json");
        let Some(bytes) = self.files.get("tokenizer.json") else {
            let source = std::io::Error::from(std::io::ErrorKind::NotFound);
            return Err(LoadError::Io { path, source });
        };
        self.special().and_then(|s| tokenizer::from_json(bytes, &s, rows)).map_err(|f| fault(&self.path, f))
    }

    /// The chat template: a file of its own, or an entry of the tokenizer's configuration.
    pub fn template(&self) -> Result<ChatTemplate, LoadError> {
        let build = || {
            let special = self.special()?;
            let json = json_of(&self.files, "tokenizer_config.json")?.unwrap_or_default();
            let inline = &json["chat_template"];
            let file = self.files.get("chat_template.jinja").map(|bytes| std::str::from_utf8(bytes));
            let file =
                file.transpose().map_err(|_| Fault::Malformed("chat_template.jinja is not UTF-8".into()))?;
            // Several templates: the one for plain conversations.
            let named = inline.as_array().and_then(|all| all.iter().find(|t| t["name"] == "default"));
            let source = file.or(inline.as_str()).or(named.and_then(|t| t["template"].as_str()));
            ChatTemplate::new(
                source,
                special.bos.as_deref().unwrap_or_default(),
                special.eos.as_deref().unwrap_or_default(),
            )
        };
        build().map_err(|f| fault(&self.path, f))
    }

    /// Which tokens begin and end texts.
    fn special(&self) -> Result<Special, Fault> {
        let json = |name| Ok::<_, Fault>(json_of(&self.files, name)?.unwrap_or_default());
        let (tokenizer, map) = (json("tokenizer_config.json")?, json("special_tokens_map.json")?);
        // A token is written as its text, or as an object that has it.
        let text =
            |from: &Value, key: &str| from[key].as_str().or(from[key]["content"].as_str()).map(str::to_owned);
        let token = |key| text(&tokenizer, key).or_else(|| text(&map, key));
        let mut end = Vec::new();
        for name in ["generation_config.json", "config.json"] {
            let ids = &json(name)?["eos_token_id"];
            let several = ids.as_array().map_or(std::slice::from_ref(ids), Vec::as_slice);
            end.extend(several.iter().filter_map(|id| u32::try_from(id.as_u64()?).ok()));
        }
        Ok(Special {
            bos: token("bos_token"),
            eos: token("eos_token"),
            add_bos: tokenizer["add_bos_token"].as_bool(),
            end,
        })
    }

    /// Adds the small files to a hash.
    pub fn hash(&self, hash: &mut Sha256) {
        for name in TEXT_FILES {
            if let Some(bytes) = self.files.get(name) {
                hash.update(format!("{name} {}\n", bytes.len()));
                hash.update(bytes);
            }
        }
    }
}

/// The files that an index names.
fn shards_of(index: &[u8]) -> Result<Vec<String>, Fault> {
    let json: Value = serde_json::from_slice(index).map_err(|e| Fault::Malformed(e.to_string()))?;
    let Some(weights) = json["weight_map"].as_object() else {
        return Err(Fault::Malformed("it has no weight_map".into()));
    };
    let mut names = BTreeSet::new();
    for name in weights.values() {
        // A name with a path in it could lead anywhere.
        match name.as_str() {
            Some(name) if !name.contains(['/', '\\']) && name.ends_with(".safetensors") => names.insert(name),
            _ => return Err(Fault::Malformed(format!("{name} is no safetensors file in this directory"))),
        };
    }
    Ok(names.into_iter().map(str::to_owned).collect())
}

/// A file's JSON; `None` if there is no such file.
fn json_of(files: &HashMap<&'static str, Vec<u8>>, name: &str) -> Result<Option<Value>, Fault> {
    let parse = |bytes: &Vec<u8>| serde_json::from_slice(bytes);
    files.get(name).map(parse).transpose().map_err(|e| Fault::Malformed(format!("{name}: {e}")))
}

/// A file's bytes; `None` if there is no such file.
fn read_if_there(path: &Path) -> Result<Option<Vec<u8>>, LoadError> {
    match std::fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(LoadError::Io { path: path.to_owned(), source }),
    }
}
