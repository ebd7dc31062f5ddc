//! Storage types of tensors, common to all file formats.

use std::path::Path;

use crate::model::error::ModelError;

/// An element type in which weights can be exported.
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
    /// All element types. If two are equally common in a file, the earlier one is preferred.
    pub const ALL: [ElementType; 3] = [ElementType::F32, ElementType::Bf16, ElementType::F16];

    /// Returns the name in requests and file names.
    pub fn name(self) -> &'static str {
        match self {
            ElementType::F32 => "f32",
            ElementType::Bf16 => "bf16",
            ElementType::F16 => "f16",
        }
    }

    /// Returns the element type with this name in requests.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|t| t.name() == name)
    }

    /// Returns the name in config.json.
    pub fn torch_name(self) -> &'static str {
        match self {
            ElementType::F32 => "float32",
            ElementType::Bf16 => "bfloat16",
            ElementType::F16 => "float16",
        }
    }

    /// Returns the bytes per element.
    pub fn size(self) -> usize {
        match self {
            ElementType::F32 => 4,
            ElementType::Bf16 | ElementType::F16 => 2,
        }
    }
}

/// Element type, number of dimensions and number of elements of a stored tensor.
pub(in crate::formats) struct StoredAs {
    pub dtype: ElementType,
    /// Name of the format of the elements. It differs from that of `dtype` if they are quantised.
    pub format: &'static str,
    pub dims: usize,
    pub elements: usize,
}

/// Callback that checks the bytes of a tensor before they are used. Its arguments are the file's
/// path and the bytes.
pub(in crate::formats) type Check<'a> = dyn Fn(&Path, &[u8]) -> Result<(), ModelError> + 'a;
