//! How tensors are stored, whatever the files' format.

use std::path::Path;

use crate::model::error::ModelError;

/// An element type that weights are exported in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ElementType {
    /// IEEE single precision.
    F32,
    /// The upper half of f32.
    Bf16,
    /// IEEE half precision.
    F16,
}

impl ElementType {
    /// All of them, the first is preferred where two are equally common.
    pub const ALL: [ElementType; 3] = [ElementType::F32, ElementType::Bf16, ElementType::F16];

    /// The name in requests and file names.
    pub fn name(self) -> &'static str {
        match self {
            ElementType::F32 => "f32",
            ElementType::Bf16 => "bf16",
            ElementType::F16 => "f16",
        }
    }

    /// The element type that a request names.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|t| t.name() == name)
    }

    /// The name in config.json.
    pub fn torch_name(self) -> &'static str {
        match self {
            ElementType::F32 => "float32",
            ElementType::Bf16 => "bfloat16",
            ElementType::F16 => "float16",
        }
    }

    /// Bytes of an element.
    pub fn size(self) -> usize {
        match self {
            ElementType::F32 => 4,
            ElementType::Bf16 | ElementType::F16 => 2,
        }
    }
}

/// Tensors of one kind: their element type, number of dimensions and number of elements.
pub(in crate::formats) struct StoredAs {
    pub dtype: ElementType,
    pub dims: usize,
    pub elements: usize,
}

/// Gets a file's path and the bytes of a tensor in it before they are used.
pub(in crate::formats) type Check<'a> = dyn Fn(&Path, &[u8]) -> Result<(), ModelError> + 'a;
