//! Which instruction set the kernels use: found at run time, so that one binary runs everywhere and is fast where it can be.

use std::fmt;
use std::str::FromStr;

/// An instruction set that kernels are written for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Isa {
    /// Plain Rust, whatever the compiler makes of it; also what serves other architectures.
    Portable,
    /// NEON with its dot products of bytes: Arm from about 2018.
    Neon,
    /// AVX2 with FMA and F16C: x86 from about 2013.
    Avx2,
    /// AVX-512 (F, BW, VL, VNNI): Ice Lake, Zen 4 and later.
    Avx512,
}

impl Isa {
    /// All of them, slowest first.
    pub const ALL: [Isa; 4] = [Isa::Portable, Isa::Neon, Isa::Avx2, Isa::Avx512];

    /// Whether this processor has it.
    pub fn supported(self) -> bool {
        match self {
            Isa::Portable => true,
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => std::arch::is_aarch64_feature_detected!("dotprod"),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => {
                is_x86_feature_detected!("avx2")
                    && is_x86_feature_detected!("fma")
                    && is_x86_feature_detected!("f16c")
            }
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => {
                Isa::Avx2.supported()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("avx512vnni")
            }
            _ => false,
        }
    }

    /// The fastest that this processor has, unless the environment variable `STOKER_CPU_ISA` (`portable`, `neon`,
    /// `avx2`, `avx512`) names a slower one: for comparisons, and as a way out.
    pub fn best() -> Isa {
        if let Ok(name) = std::env::var("STOKER_CPU_ISA") {
            match name.parse::<Isa>() {
                Ok(isa) if isa.supported() => return isa,
                _ => {
                    tracing::warn!(name, "STOKER_CPU_ISA names no instruction set of this processor; ignored")
                }
            }
        }
        Self::ALL.into_iter().rev().find(|isa| isa.supported()).unwrap_or(Isa::Portable)
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Isa::Portable => "portable",
            Isa::Neon => "neon",
            Isa::Avx2 => "avx2",
            Isa::Avx512 => "avx512",
        })
    }
}

impl FromStr for Isa {
    type Err = ();
    fn from_str(name: &str) -> Result<Self, ()> {
        Self::ALL.into_iter().find(|isa| isa.to_string() == name).ok_or(())
    }
}
