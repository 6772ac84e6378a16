//! Reads a GGUF file's header: metadata and the table of tensors.
//!
//! After the specification, versions 2 and 3, little-endian
//! (<https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>). Files come from anywhere, so nothing in one is believed:
//! each count, length, offset, size and alignment is checked against the bytes that are there before anything is reserved
//! for it. Strings and arrays stay where they are in the file; only their places are kept, so a header of any size costs
//! a few bytes per entry.

use std::collections::HashMap;
use std::ops::Range;

use super::{DType, Fault};

/// Deepest nesting of arrays; the format sets no limit, files use one level.
const MAX_ARRAY_DEPTH: u32 = 4;
/// Most dimensions of a tensor.
const MAX_DIMS: usize = 4;

type Read<T> = Result<T, Fault>;

fn malformed<T>(message: impl Into<String>) -> Read<T> {
    Err(Fault::Malformed(message.into()))
}

fn unsupported<T>(message: impl Into<String>) -> Read<T> {
    Err(Fault::Unsupported(message.into()))
}

/// A metadata value's type, as numbered by the specification.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    F32,
    Bool,
    String,
    Array,
    U64,
    I64,
    F64,
}

impl Kind {
    fn new(code: u32) -> Read<Self> {
        const ALL: [Kind; 13] = [
            Kind::U8,
            Kind::I8,
            Kind::U16,
            Kind::I16,
            Kind::U32,
            Kind::I32,
            Kind::F32,
            Kind::Bool,
            Kind::String,
            Kind::Array,
            Kind::U64,
            Kind::I64,
            Kind::F64,
        ];
        match ALL.get(code as usize) {
            Some(kind) => Ok(*kind),
            None => malformed(format!("metadata type {code} does not exist")),
        }
    }

    /// Bytes of a value; `None` for strings and arrays.
    fn size(self) -> Option<usize> {
        match self {
            Self::U8 | Self::I8 | Self::Bool => Some(1),
            Self::U16 | Self::I16 => Some(2),
            Self::U32 | Self::I32 | Self::F32 => Some(4),
            Self::U64 | Self::I64 | Self::F64 => Some(8),
            Self::String | Self::Array => None,
        }
    }
}

/// A metadata value; strings and arrays as places in the file.
#[derive(Clone, Debug, PartialEq)]
enum Value {
    Uint(u64),
    Int(i64),
    Float(f64),
    Bool(bool),
    String(Range<usize>),
    Array { kind: Kind, count: usize, at: Range<usize> },
}

/// A tensor as the table has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// Its number format.
    pub dtype: DType,
    /// Row-major, outermost first.
    pub shape: Vec<usize>,
    /// Its bytes in the file.
    pub range: Range<usize>,
}

/// A file's metadata.
#[derive(Debug)]
pub struct Gguf {
    metadata: HashMap<String, Value>,
    /// Bytes before the tensors' data.
    pub header_len: usize,
}

/// A place in the file, and reads that check.
struct Cursor<'a> {
    data: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    fn left(&self) -> usize {
        self.data.len() - self.at
    }

    fn bytes(&mut self, len: usize) -> Read<&'a [u8]> {
        match self.at.checked_add(len).and_then(|end| self.data.get(self.at..end)) {
            Some(bytes) => {
                self.at += len;
                Ok(bytes)
            }
            None => malformed(format!(
                "truncated: {len} bytes wanted at byte {}, the file has {}",
                self.at,
                self.data.len()
            )),
        }
    }

    fn array<const N: usize>(&mut self) -> Read<[u8; N]> {
        let mut out = [0; N];
        out.copy_from_slice(self.bytes(N)?);
        Ok(out)
    }

    fn u32(&mut self) -> Read<u32> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Read<u64> {
        self.array().map(u64::from_le_bytes)
    }

    /// A number of things that take at least `least` bytes each.
    fn count(&mut self, least: usize, what: &str) -> Read<usize> {
        let n = self.u64()?;
        match usize::try_from(n) {
            Ok(count) if count <= self.left() / least => Ok(count),
            _ => malformed(format!("{n} {what} do not fit a file of {} bytes", self.data.len())),
        }
    }

    /// The place of a string.
    fn string(&mut self) -> Read<Range<usize>> {
        let len = self.count(1, "bytes of a string")?;
        let start = self.at;
        self.bytes(len)?;
        Ok(start..self.at)
    }

    /// A string that names something.
    fn name(&mut self) -> Read<&'a str> {
        let range = self.string()?;
        std::str::from_utf8(&self.data[range])
            .or_else(|_| malformed(format!("a name before byte {} is not UTF-8", self.at)))
    }

    fn value(&mut self, kind: Kind, depth: u32) -> Read<Value> {
        Ok(match kind {
            Kind::U8 => Value::Uint(self.array::<1>()?[0].into()),
            Kind::I8 => Value::Int(i8::from_le_bytes(self.array()?).into()),
            Kind::U16 => Value::Uint(u16::from_le_bytes(self.array()?).into()),
            Kind::I16 => Value::Int(i16::from_le_bytes(self.array()?).into()),
            Kind::U32 => Value::Uint(self.u32()?.into()),
            Kind::I32 => Value::Int(i32::from_le_bytes(self.array()?).into()),
            Kind::F32 => Value::Float(f32::from_le_bytes(self.array()?).into()),
            Kind::Bool => Value::Bool(self.array::<1>()?[0] != 0),
            Kind::U64 => Value::Uint(self.u64()?),
            Kind::I64 => Value::Int(i64::from_le_bytes(self.array()?)),
            Kind::F64 => Value::Float(f64::from_le_bytes(self.array()?)),
            Kind::String => Value::String(self.string()?),
            Kind::Array => self.elements(depth)?,
        })
    }

    /// Walks over an array.
    fn elements(&mut self, depth: u32) -> Read<Value> {
        if depth == MAX_ARRAY_DEPTH {
            return unsupported(format!("arrays nested deeper than {MAX_ARRAY_DEPTH}"));
        }
        let kind = Kind::new(self.u32()?)?;
        // A string takes at least its length's 8 bytes, an array its type's and count's 12.
        let count = self.count(kind.size().unwrap_or(8), "elements of an array")?;
        let start = self.at;
        match kind.size() {
            Some(size) => {
                self.bytes(count * size)?;
            }
            None => {
                for _ in 0..count {
                    self.value(kind, depth + 1)?;
                }
            }
        }
        Ok(Value::Array { kind, count, at: start..self.at })
    }

    /// One line of the tensor table; the range is relative to the data's start.
    fn tensor(&mut self, alignment: u64) -> Read<(&'a str, TensorInfo)> {
        let name = self.name()?;
        let dims = self.u32()? as usize;
        if !(1..=MAX_DIMS).contains(&dims) {
            return malformed(format!("tensor {name} has {dims} dimensions"));
        }
        let mut shape = Vec::with_capacity(dims);
        for _ in 0..dims {
            match usize::try_from(self.u64()?) {
                Ok(n) if n > 0 => shape.push(n),
                _ => return malformed(format!("tensor {name} has an impossible size")),
            }
        }
        shape.reverse();
        let dtype = DType::from_gguf(self.u32()?).or_else(|format| {
            let known: Vec<_> = DType::ALL.iter().map(|d| d.name()).collect();
            unsupported(format!("tensor {name} has format {format}; supported are {}", known.join(", ")))
        })?;
        let offset = self.u64()?;
        if !offset.is_multiple_of(alignment) {
            return malformed(format!("tensor {name} is not aligned to {alignment} bytes"));
        }
        let row = shape[dims - 1];
        let Some(row_bytes) = dtype.row_bytes(row) else {
            return malformed(format!(
                "tensor {name}: rows of {row} values are no whole {} blocks",
                dtype.name()
            ));
        };
        let size = shape[..dims - 1].iter().try_fold(row_bytes, |n, d| n.checked_mul(*d));
        let range = size.and_then(|size| {
            let start = usize::try_from(offset).ok()?;
            Some(start..start.checked_add(size)?)
        });
        match range {
            Some(range) => Ok((name, TensorInfo { dtype, shape, range })),
            None => malformed(format!("tensor {name} has an impossible size or place")),
        }
    }
}

impl Gguf {
    /// Reads the header of a whole file in memory: its metadata, and its tensors by name.
    pub fn parse(data: &[u8]) -> Read<(Self, HashMap<String, TensorInfo>)> {
        let mut cursor = Cursor { data, at: 0 };
        if cursor.bytes(4).ok() != Some(b"GGUF") {
            return malformed("not a GGUF file (its first bytes are not \"GGUF\")");
        }
        match cursor.u32()? {
            2 | 3 => {}
            v if v.swap_bytes() <= 3 => {
                return unsupported("a big-endian GGUF file; convert it to little-endian");
            }
            v => return unsupported(format!("GGUF version {v}; supported are 2 and 3")),
        }
        // The shortest tensor entry: empty name, one dimension, type, offset; the shortest metadata entry: empty key,
        // type, one byte.
        let tensors = cursor.count(32, "tensors")?;
        let entries = cursor.count(13, "metadata entries")?;

        let mut metadata = HashMap::new();
        for _ in 0..entries {
            let key = cursor.name()?;
            let kind = Kind::new(cursor.u32()?)?;
            let value = cursor.value(kind, 0)?;
            if metadata.insert(key.to_owned(), value).is_some() {
                return malformed(format!("metadata key {key} is there twice"));
            }
        }
        let mut this = Self { metadata, header_len: 0 };
        let alignment = this.uint("general.alignment").unwrap_or(32);
        if !alignment.is_power_of_two() || !(8..=1 << 20).contains(&alignment) {
            return malformed(format!("general.alignment is {alignment}, not a power of two from 8 to 2^20"));
        }
        let mut infos = HashMap::new();
        for _ in 0..tensors {
            let (name, info) = cursor.tensor(alignment)?;
            if infos.insert(name.to_owned(), info).is_some() {
                return malformed(format!("tensor {name} is there twice"));
            }
        }
        this.header_len = cursor.at.next_multiple_of(alignment as usize);
        place(&mut infos, this.header_len, data.len())?;
        Ok((this, infos))
    }

    /// Whether there is such a metadata entry.
    pub fn has_key(&self, key: &str) -> bool {
        self.metadata.contains_key(key)
    }

    /// A whole number that is not negative.
    pub fn uint(&self, key: &str) -> Option<u64> {
        match self.metadata.get(key)? {
            Value::Uint(n) => Some(*n),
            Value::Int(n) => u64::try_from(*n).ok(),
            _ => None,
        }
    }

    /// A number.
    pub fn float(&self, key: &str) -> Option<f64> {
        match self.metadata.get(key)? {
            Value::Float(x) => Some(*x),
            Value::Uint(n) => Some(*n as f64),
            Value::Int(n) => Some(*n as f64),
            _ => None,
        }
    }

    /// A truth value.
    pub fn bool(&self, key: &str) -> Option<bool> {
        match self.metadata.get(key)? {
            Value::Bool(b) => Some(*b),
            _ => None,
        }
    }

    /// A string; `data` is the file. `None` also if it is not UTF-8.
    pub fn str<'a>(&self, data: &'a [u8], key: &str) -> Option<&'a str> {
        match self.metadata.get(key)? {
            Value::String(at) => std::str::from_utf8(data.get(at.clone())?).ok(),
            _ => None,
        }
    }

    /// An array of strings; `data` is the file.
    pub fn strings<'a>(&self, data: &'a [u8], key: &str) -> Option<Vec<&'a [u8]>> {
        let Value::Array { kind: Kind::String, count, at } = self.metadata.get(key)? else { return None };
        let mut cursor = Cursor { data: data.get(..at.end)?, at: at.start };
        (0..*count).map(|_| Some(&data[cursor.string().ok()?])).collect()
    }

    /// An array of numbers, as they are nearest in `f64`; `data` is the file.
    pub fn numbers(&self, data: &[u8], key: &str) -> Option<Vec<f64>> {
        let Value::Array { kind, count, at } = self.metadata.get(key)? else { return None };
        let mut cursor = Cursor { data: data.get(..at.end)?, at: at.start };
        (0..*count)
            .map(|_| match cursor.value(*kind, MAX_ARRAY_DEPTH).ok()? {
                Value::Uint(n) => Some(n as f64),
                Value::Int(n) => Some(n as f64),
                Value::Float(x) => Some(x),
                Value::Bool(b) => Some(b.into()),
                Value::String(_) | Value::Array { .. } => None,
            })
            .collect()
    }
}

/// Makes the tensors' ranges absolute, and checks that they are in the file and apart from each other.
fn place(tensors: &mut HashMap<String, TensorInfo>, start: usize, file: usize) -> Read<()> {
    let mut used = Vec::with_capacity(tensors.len());
    for (name, info) in tensors {
        let range = &mut info.range;
        match (range.start.checked_add(start), range.end.checked_add(start)) {
            (Some(from), Some(to)) if to <= file => *range = from..to,
            _ => {
                return malformed(format!(
                    "truncated: tensor {name} ends {} bytes behind the header, the file {}",
                    range.end,
                    file.saturating_sub(start)
                ));
            }
        }
        used.push((range.start, range.end, name.as_str()));
    }
    used.sort_unstable();
    match used.windows(2).find(|w| w[1].0 < w[0].1) {
        Some(w) => malformed(format!("tensors {} and {} overlap", w[0].2, w[1].2)),
        None => Ok(()),
    }
}
