"""What the stable headers declare: the names that no rule may report."""

MEMBERS = frozenset(
    (
        *("get", "data_ptr", "mutable_data_ptr", "const_data_ptr", "set_requires_grad", "dim", "numel", "sizes"),
        *("strides", "is_contiguous", "stride", "size", "get_device", "get_device_index", "is_cuda", "is_cpu"),
        *("device", "layout", "scalar_type", "defined", "storage_offset", "element_size", "has_storage"),
    )
)
"""Members of torch::stable::Tensor."""

NOT_TENSORS = frozenset(
    (
        *MEMBERS,
        *("dtype", "options", "type", "item", "nbytes", "itemsize", "ndimension", "is_sparse", "is_complex"),
        *("is_floating_point", "is_signed", "is_same", "is_alias_of", "accessor", "packed_accessor32", "storage"),
        *("packed_accessor64", "packed_accessor", "requires_grad", "unbind", "split", "chunk", "sort", "topk"),
        *("suggest_memory_format", "is_non_overlapping_and_dense", "unsafeGetTensorImpl", "is_pinned", "use_count"),
        *("is_quantized", "is_mps", "is_xpu", "is_meta", "name", "equal", "allclose", "has_names", "toString"),
        *("generic_packed_accessor", "untyped_storage", "key_set", "_version", "grad_fn", "is_leaf"),
    )
)
"""Members of at::Tensor whose result is not a tensor."""
TENSOR_LISTS = frozenset(("unbind", "split", "chunk", "tensor_split", "meshgrid", "broadcast_tensors", "where"))
"""Functions and members whose result is a list of tensors."""

C10_NAMES = frozenset(
    (
        *("Half", "BFloat16", "Float8_e4m3fn", "Float8_e5m2", "Float8_e4m3fnuz", "Float8_e5m2fnuz", "Float8_e8m0fnu"),
        *("Float4_e2m1fn_x2", "complex", "ScalarType", "DeviceType", "Layout", "MemoryFormat", "bit_cast", "quint8"),
        *("qint8", "qint32", "quint4x2", "quint2x4", "bits8", "bits16", "bits1x8", "bits2x4", "bits4x2", "toString"),
        *("CppTypeToScalarType", "NumScalarTypes", "isQIntType", "toUnderlying", "is_negative", "greater_than_max"),
        *("signum", "signs_differ", "less_than_lowest", "HeaderOnlyArrayRef", "get_contiguous_memory_format"),
        *("kStrided", "kSparse", "kSparseCsr", "kSparseCsc", "kSparseBsr", "kSparseBsc", "kJagged", "kMkldnn"),
        *("kCPU", "kCUDA", "kHIP", "kXLA", "kMPS", "kMeta", "kXPU", "kPrivateUse1", "kMTIA", "kHPU", "kLazy", "kIPU"),
        *("kMAIA", "kVE", "kVulkan", "kMetal", "kFPGA", "COMPILE_TIME_MAX_DEVICE_TYPES", "dummy_int1_7_t"),
        *("dummy_uint1_7_t", "operator", "guts", "detail::bits_from_f32", "detail::f32_from_bits"),
        *("detail::fp32_from_bits", "detail::fp32_to_bits", "impl::ScalarTypeToCPPTypeT", "enum_tag", "Tag"),
    )
)
"""Names that torch/headeronly declares in c10, and, by a using directive of its own, in at."""

MACROS = frozenset(
    (
        *(
            "TORCH_VERSION*",
            "TORCH_BOX",
            "TORCH_TARGET_VERSION",
            "TORCH_FEATURE_VERSION",
            "TORCH_ABI_VERSION",
            "TORCH_STABLE_ONLY",
        ),
        *("TORCH_ERROR_CODE_CHECK", "TORCH_SUCCESS", "TORCH_FAILURE", "TORCH_DYNAMIC_VERSION_CALL", "AT_AP"),
        *("AT_WRAP", "AT_EXPAND", "AT_FLOAT8_TYPES", "AT_INTEGRAL_TYPES", "AT_FLOATING_TYPES", "AT_OPAQUE_TYPES"),
        *("AT_BAREBONES_UNSIGNED_TYPES", "AT_INTEGRAL_TYPES_V2", "AT_COMPLEX_TYPES", "AT_QINT_TYPES", "AT_ALL_TYPES"),
        *("AT_ALL_TYPES_AND_COMPLEX", "AT_CONCAT", "AT_CONCAT_AUX", "AT_NUM_ARGS", "AT_NUM_ARGS_AUX"),
        *("C10_ASAN_ENABLED", "C10_UBSAN_ENABLED", "C10_DISABLE_COPY_AND_ASSIGN", "C10_CONCATENATE_IMPL"),
        *("C10_CONCATENATE", "C10_MACRO_EXPAND", "C10_STRINGIZE_IMPL", "C10_STRINGIZE", "C10_UID"),
        *("C10_ANONYMOUS_VARIABLE", "C10_HAS_CPP_ATTRIBUTE", "C10_NODISCARD", "C10_UNUSED", "C10_USED"),
        *("C10_RESTRICT", "C10_LIKELY", "C10_UNLIKELY", "C10_LIKELY_OR_CONST", "C10_UNLIKELY_OR_CONST"),
        *("C10_NOINLINE", "C10_ALWAYS_INLINE", "C10_ALWAYS_INLINE_ATTRIBUTE", "C10_ATTR_VISIBILITY_HIDDEN"),
        *("C10_ERASE", "C10_HOST_DEVICE", "C10_DEVICE", "C10_HOST", "C10_MAX_THREADS_PER_BLOCK", "C10_WARP_SIZE"),
        *("C10_MIN_BLOCKS_PER_SM", "C10_LAUNCH_BOUNDS_0", "C10_LAUNCH_BOUNDS_1", "C10_LAUNCH_BOUNDS_2"),
        *("C10_HIP_HOST_DEVICE", "C10_HIP_HOST", "C10_WARP_SIZE_LOWER_BOUND", "C10_WARP_SIZE_UPPER_BOUND"),
        *("C10_ANDROID", "C10_MOBILE", "C10_IOS", "C10_ALWAYS_INLINE_UNLESS_MOBILE", "C10_EXPORT", "C10_IMPORT"),
        *(
            "C10_HIDDEN",
            "C10_API",
            "C10_CLANG_DIAGNOSTIC_PUSH",
            "C10_CLANG_DIAGNOSTIC_POP",
            "C10_RETURN_MOVE_IF_OLD_COMPILER",
        ),
        *("C10_CLANG_DIAGNOSTIC_IGNORE", "C10_CLANG_HAS_WARNING", "C10_DIAGNOSTIC_PUSH_AND_IGNORED_IF_DEFINED"),
        *("C10_DIAGNOSTIC_POP", "C10_HOST_CONSTEXPR_EXCEPT_WIN_CUDA", "TORCH_VERSION_2_9_0", "TORCH_CUDA_ARCH_LIST"),
        *("C10_DEFINE_*", "AT_FORALL_*", "TORCH_VERSION_2_*", "C10_BUILD_*", "C10_USING_*", "TORCH_EXTENSION_NAME*"),
    )
)
"""Macros of torch/headeronly, torch/csrc/stable and the shims that begin like unstable ones; ``*`` is an open end."""

STABLE_SPACES = frozenset(("stable", "headeronly"))
"""The namespaces inside torch that are stable."""
