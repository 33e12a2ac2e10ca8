//! 128 bits as lanes.

use std::array::from_fn;

macro_rules! lanes {
    ($split:ident, $join:ident, $map:ident, $type:ty, $count:literal) => {
        #[inline(always)]
        pub fn $split(value: u128) -> [$type; $count] {
            from_fn(|n| (value >> (n * <$type>::BITS as usize)) as $type)
        }
        #[inline(always)]
        pub fn $join(lanes: [$type; $count]) -> u128 {
            let mut value = 0;
            for (n, lane) in lanes.into_iter().enumerate() {
                value |= (lane as u128 & (u128::MAX >> (128 - <$type>::BITS)))
                    << (n * <$type>::BITS as usize);
            }
            value
        }
        /// Lane by lane.
        #[inline(always)]
        pub fn $map(a: u128, b: u128, f: impl Fn($type, $type) -> $type) -> u128 {
            let (a, b) = ($split(a), $split(b));
            $join(from_fn(|n| f(a[n], b[n])))
        }
    };
}

lanes!(u8s, join_u8, map_u8, u8, 16);
lanes!(i8s, join_i8, map_i8, i8, 16);
lanes!(u16s, join_u16, map_u16, u16, 8);
lanes!(i16s, join_i16, map_i16, i16, 8);
lanes!(u32s, join_u32, map_u32, u32, 4);
lanes!(i32s, join_i32, map_i32, i32, 4);
lanes!(u64s, join_u64, map_u64, u64, 2);
lanes!(i64s, join_i64, map_i64, i64, 2);

/// All ones for true.
macro_rules! truth {
    ($name:ident, $type:ty) => {
        #[inline(always)]
        pub fn $name(holds: bool) -> $type {
            (0 as $type).wrapping_sub(holds as $type)
        }
    };
}
truth!(truth8, u8);
truth!(truth16, u16);
truth!(truth32, u32);
truth!(truth64, u64);
truth!(truth8s, i8);
truth!(truth16s, i16);
truth!(truth32s, i32);
truth!(truth64s, i64);
